"""What a model's folder holds: `sqft inspect`."""
