"""How good a model is: perplexity, zero-shot tasks, samples, and the reports that show them."""
