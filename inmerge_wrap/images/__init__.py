"""Images of one's own: read from any file, prepared for a network, collected, checked and split."""
