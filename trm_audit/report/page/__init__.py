"""The summary as a page for a browser: what figures there are, how they are drawn, and the templates around them."""
