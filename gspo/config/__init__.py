"""Reading and checking a recipe's config."""
