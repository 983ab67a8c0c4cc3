"""report.json, report.html and the verdict on the terminal."""
