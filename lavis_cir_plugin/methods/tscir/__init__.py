"""Zero-shot composed retrieval in two stages on any CLIP. Method card: docs/tscir.md."""
