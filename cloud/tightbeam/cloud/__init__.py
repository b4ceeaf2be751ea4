"""The cloud: hosts a frozen backbone's trunk and computes it for many edges."""
