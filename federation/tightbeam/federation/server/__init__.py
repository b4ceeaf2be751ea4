"""The server of a federation: what it asks for, judges, combines and keeps."""
