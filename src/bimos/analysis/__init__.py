"""What a trained model has learnt: how it mixes its scaling experts over the tokens of a text (`bimos inspect`)."""
