"""Write a merge as an ordinary Hugging Face folder."""
