"""Downloading from a Hugging Face hub: client.py asks the hub, fetch.py writes files, start.sh starts the download."""
