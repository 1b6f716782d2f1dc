"""The whole report as one HTML file."""
