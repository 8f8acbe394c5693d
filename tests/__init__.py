"""Tests of the library; a package, so that its helpers import by one name wherever pytest is started."""
