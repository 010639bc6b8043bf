"""Pages for a browser: self-contained HTML with inline plots."""
