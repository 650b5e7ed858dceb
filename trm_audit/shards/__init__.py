"""Files and streams: the schemas, reading, checking, writing, publishing. No model is touched here."""
