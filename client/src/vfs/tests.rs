//! Client operations against an in-memory master and data plane.
