"""Fine-tuning and what holds it back: FT, EWC, replay, retraining, LoRA."""
