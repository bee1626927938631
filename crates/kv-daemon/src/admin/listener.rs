//! Connections of the admin server: bounded in number and in age, in TLS when that is set.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{Accept, TlsAcceptor};

/// A connection older than this is closed, whatever it does.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(60);

/// A listener that takes the next connection when one of a fixed number of places is free.
pub(super) struct BoundedListener {
    listener: TcpListener,
    places: Arc<Semaphore>,
    acceptor: Option<TlsAcceptor>,
}

impl BoundedListener {
    pub(super) fn new(listener: TcpListener, connections_max: u32, acceptor: Option<TlsAcceptor>) -> BoundedListener {
        BoundedListener {
            listener,
            places: Arc::new(Semaphore::new(connections_max as usize)),
            acceptor,
        }
    }
}

impl axum::serve::Listener for BoundedListener {
    type Io = AgedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (AgedStream, SocketAddr) {
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
        let stream = match &self.acceptor {
            None => Transport::Plain(stream),
            Some(acceptor) => Transport::Handshake(Box::new(acceptor.accept(stream))),
        };
        let end = Box::pin(tokio::time::sleep(CONNECTION_AGE_MAX));
        let stream = AgedStream {
            stream,
            end,
            _place: place,
        };
        (stream, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that reads nothing more past its age.
pub(super) struct AgedStream {
    stream: Transport,
    end: Pin<Box<tokio::time::Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

/// What carries the bytes. The handshake is part of the first read, so that a slow one keeps nobody else waiting.
enum Transport {
    Plain(TcpStream),
    Handshake(Box<Accept<TcpStream>>),
    Tls(Box<TlsStream<TcpStream>>),
    Broken,
}

trait Bytes: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Bytes for T {}

impl AgedStream {
    fn poll_age(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.end.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl Transport {
    fn poll_open(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Pin<&mut dyn Bytes>>> {
        if let Transport::Handshake(accept) = self {
            *self = match ready!(Pin::new(accept.as_mut()).poll(context)) {
                Ok(stream) => Transport::Tls(Box::new(stream)),
                Err(error) => {
                    *self = Transport::Broken;
                    return Poll::Ready(Err(error));
                }
            };
        }
        Poll::Ready(match self {
            Transport::Plain(stream) => Ok(Pin::new(stream)),
            Transport::Tls(stream) => Ok(Pin::new(stream.as_mut())),
            Transport::Handshake(_) | Transport::Broken => Err(io::ErrorKind::NotConnected.into()),
        })
    }
}

impl AsyncRead for AgedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_age(context)?;
        ready!(self.stream.poll_open(context))?.poll_read(context, buffer)
    }
}

impl AsyncWrite for AgedStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_age(context)?;
        ready!(self.stream.poll_open(context))?.poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.stream.poll_open(context))?.poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            // Nothing was said yet, so there is nothing to end.
            Transport::Handshake(_) | Transport::Broken => Poll::Ready(Ok(())),
            stream => ready!(stream.poll_open(context))?.poll_shutdown(context),
        }
    }
}
