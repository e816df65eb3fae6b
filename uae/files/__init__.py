"""What lies on a disk: where it is, how a picture is read, how a file is written whole."""
