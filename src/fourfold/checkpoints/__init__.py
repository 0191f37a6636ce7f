"""Where bytes come from and go to: sources that are read, layouts that are written."""
