"""Training what an artifact stores, by distillation from the model that it was made of."""
