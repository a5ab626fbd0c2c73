"""Running the unpatched model on a few texts, for methods that choose or fit something before they are applied."""
