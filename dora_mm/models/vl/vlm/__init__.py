"""Vision-language models of transformers: the class, its processor, and rows of text and images as its inputs."""
