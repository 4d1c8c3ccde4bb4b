"""The icons in six styles, and the image folders samples/3d_icon and samples/lego."""
