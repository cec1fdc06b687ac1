//! The VMM and the file server.
