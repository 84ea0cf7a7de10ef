"""Independent designs after ideas published without code or details: no reproductions, and they may change."""
