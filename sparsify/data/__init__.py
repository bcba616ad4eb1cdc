"""Training text: sources of documents, packed into sequences of tokens, in resumable batches."""
