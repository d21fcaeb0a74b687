"""Building blocks of the decoders and encoders."""
