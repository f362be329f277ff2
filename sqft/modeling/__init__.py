"""The only room that knows transformers and peft."""
