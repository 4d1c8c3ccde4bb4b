"""What a config's `adapter` section trains of a model's networks, of images and of questions alike, and its files."""
