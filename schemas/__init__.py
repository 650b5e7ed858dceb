"""The file formats, a page each, and the JSON Schema of the report; shipped as package data of `trm_audit.schemas`."""
