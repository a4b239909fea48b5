"""MusicGen: music from descriptions, melodies and recordings, and fine-tuning on one's own."""

__version__ = "0.1.0"
