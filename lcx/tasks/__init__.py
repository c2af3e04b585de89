"""The tasks a long-context model is measured on, one file each."""
