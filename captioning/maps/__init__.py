"""Which pixels each word looked at."""
