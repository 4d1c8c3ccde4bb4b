"""Vision-language models: what a family is, and the families, VLM and VL-BART, with the towers of the latter."""
