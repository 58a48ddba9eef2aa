//! The session against a scripted master.
