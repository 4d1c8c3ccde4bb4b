"""Generated scenes of icons, with questions, sentences and captions about them in the official file formats."""
