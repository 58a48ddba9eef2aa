//! Byte streams between processes.

use async_trait::async_trait;
use std::io;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

/// A connected byte stream.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// A network.
#[async_trait]
pub trait Net: Send + Sync + 'static {
    /// Connects to `host:port`. The caller bounds the wait.
    async fn dial(&self, address: &str) -> io::Result<Box<dyn Stream>>;
    /// Listens on `host:port`; port 0 takes a free one.
    async fn listen(&self, address: &str) -> io::Result<Box<dyn Listener>>;
}

/// A listening socket.
#[async_trait]
pub trait Listener: Send + Sync + 'static {
    /// The next connection and who it comes from.
    async fn accept(&self) -> io::Result<(Box<dyn Stream>, String)>;
    /// The address that it listens on.
    fn address(&self) -> io::Result<String>;
}

/// TCP, without Nagle's delay.
pub struct Tcp;

#[async_trait]
impl Net for Tcp {
    async fn dial(&self, address: &str) -> io::Result<Box<dyn Stream>> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }

    async fn listen(&self, address: &str) -> io::Result<Box<dyn Listener>> {
        Ok(Box::new(TcpListener::bind(address).await?))
    }
}

#[async_trait]
impl Listener for TcpListener {
    async fn accept(&self) -> io::Result<(Box<dyn Stream>, String)> {
        let (stream, peer) = TcpListener::accept(self).await?;
        stream.set_nodelay(true)?;
        Ok((Box::new(stream), peer.to_string()))
    }

    fn address(&self) -> io::Result<String> {
        Ok(self.local_addr()?.to_string())
    }
}
