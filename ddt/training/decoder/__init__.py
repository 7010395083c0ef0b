"""Training of the decoder of a frozen encoder (RAE's stage 1), on the pieces of the main loop."""
