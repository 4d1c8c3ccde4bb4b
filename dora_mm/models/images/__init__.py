"""Image models: what a family is, the families (one file or folder each), and what serves all of them."""
