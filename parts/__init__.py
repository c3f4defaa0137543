"""What the scripts are put together from, one noun a file. No part imports a script."""
