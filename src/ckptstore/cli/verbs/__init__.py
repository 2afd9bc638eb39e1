"""One verb a file; the trailing underscore keeps names like `list` free."""
