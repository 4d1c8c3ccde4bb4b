"""Makes the files in samples/: icons, bricks, scenes, the small models and the judge. In a checkout only."""
