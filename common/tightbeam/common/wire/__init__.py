"""The wire: codecs, sealed records, handshake and step messages. Sans-IO: bytes in, bytes out."""
