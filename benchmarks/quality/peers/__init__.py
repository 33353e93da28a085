"""Ways of others to make language models low-rank, in our own code, side by side with ours."""
