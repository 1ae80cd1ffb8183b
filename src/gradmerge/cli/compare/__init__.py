"""`gradmerge compare`: methods tuned alike and scored once on the test split."""
