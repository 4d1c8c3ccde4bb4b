"""Jobs of pictures: files with a row per prompt and a column per setting, and the pictures that follow from them."""
