"""From text to a trained model to text: corpora, tokens, training, evaluation, generation."""
