"""Text to batches: `corpus` reads documents, `tokenizer` encodes, `batches` packs and serves; `baselines` compares."""
