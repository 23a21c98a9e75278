"""The ops of the compiled extension, in the form of d2vkern.reference; import only where it is loaded."""
