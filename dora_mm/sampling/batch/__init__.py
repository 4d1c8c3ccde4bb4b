"""Jobs of images: files with a row per prompt and a column per setting, and the images that follow from them."""
