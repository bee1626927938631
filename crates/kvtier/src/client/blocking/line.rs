use std::sync::atomic::Ordering;
use std::time::Duration;

use kvtier_core::Hints;

use super::super::batch::unexpected;
use super::super::link::{Link, micros};
use super::super::returns::{Returns, Taken};
use super::super::session::{Opened, Session};
use super::{ClientError, Shared};
use crate::wire::{Array, Envelope, Extensions, Reply, Request};

/// The connection while there is one, and the buffers that calls reuse.
#[derive(Default)]
pub(super) struct Line {
    link: Option<Link>,
    frames: Vec<u8>,
    taken: Taken,
}

impl Line {
    pub(super) fn is_connected(&self) -> bool {
        self.link.is_some()
    }

    /// The connection; a new one when there is none.
    pub(super) fn link(&mut self, shared: &Shared) -> Result<&mut Link, ClientError> {
        if self.link.is_none() {
            self.link = Some(Link::open(&shared.options, shared.returns.epoch())?);
        }
        self.link.as_mut().ok_or_else(ClientError::unanswered)
    }

    /// Closes the connection. What was leased over it is refused from here on.
    pub(super) fn disconnect(&mut self, shared: &Shared) {
        if self.link.take().is_some() {
            shared.returns.begin_epoch();
        }
    }

    /// Sends a request with what is to be given back; returns its number.
    pub(super) fn send(
        &mut self,
        shared: &Shared,
        request: &Request<'_>,
        extensions: impl Into<Extensions<'static>>,
        timeout: Duration,
    ) -> Result<u64, ClientError> {
        self.link(shared)?;
        let Some(link) = self.link.as_mut() else {
            return Err(ClientError::unanswered());
        };
        let number = link.number();
        self.frames.clear();
        shared.returns.take(&mut self.taken);
        let clock_ns = if link.session.welcome.client_clock {
            shared.clock_ns.load(Ordering::Relaxed)
        } else {
            0
        };
        let envelope = Envelope {
            request: number,
            deadline_us: micros(timeout),
            clock_ns,
            releases: Array::from(&self.taken.leases),
            extensions: extensions.into(),
        };
        let encoded = self
            .taken
            .encode_abandoned(&mut self.frames)
            .and_then(|()| Ok(request.encode(&envelope, &mut self.frames)?));
        if let Err(error) = encoded {
            // The request was refused here; what it would have taken along goes with the next one.
            shared.returns.release(link.session.epoch, self.taken.leases.drain(..));
            shared
                .returns
                .abandon(link.session.epoch, self.taken.reservations.drain(..));
            return Err(error);
        }
        let sent = link.set_timeout(timeout).and_then(|()| link.send(&self.frames));
        sent.inspect_err(|_| self.disconnect(shared))?;
        Ok(number)
    }

    /// Waits for an answer. When none comes, or one that breaks the protocol, the connection is closed.
    pub(super) fn receive<T>(
        &mut self,
        shared: &Shared,
        number: u64,
        absorb: impl FnOnce(&mut Session, Reply<'_>) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        let link = self.link.as_mut().ok_or_else(ClientError::unanswered)?;
        link.receive(number, absorb).inspect_err(|_| self.disconnect(shared))?
    }

    pub(super) fn call<T>(
        &mut self,
        shared: &Shared,
        request: &Request<'_>,
        extensions: impl Into<Extensions<'static>>,
        absorb: impl FnOnce(&mut Session, Reply<'_>) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        self.call_within(shared, request, extensions, shared.options.timeout, absorb)
    }

    pub(super) fn call_within<T>(
        &mut self,
        shared: &Shared,
        request: &Request<'_>,
        extensions: impl Into<Extensions<'static>>,
        timeout: Duration,
        absorb: impl FnOnce(&mut Session, Reply<'_>) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        let number = self.send(shared, request, extensions, timeout)?;
        self.receive(shared, number, absorb)
    }

    /// The session, with namespace `index` open in it.
    pub(super) fn opened(&mut self, shared: &Shared, index: usize) -> Result<(&mut Session, Opened), ClientError> {
        if self.link(shared)?.session.opened(index).is_none() {
            let wanted = shared.names.lock()[index].clone();
            let request = Request::OpenNamespace {
                name: &wanted.name,
                realization: wanted.realization,
            };
            self.call(shared, &request, Hints::default(), |session, reply| match reply {
                Reply::NamespaceOpened { handle, generation } => {
                    session.open(index, Opened { handle, generation });
                    Ok(())
                }
                _ => Err(unexpected()),
            })?;
        }
        let session = &mut self.link(shared)?.session;
        let opened = session.opened(index).ok_or_else(ClientError::unanswered)?;
        Ok((session, opened))
    }

    /// Sends what is to be given back, in frames of its own.
    pub(super) fn send_returns(&mut self, shared: &Shared) {
        let Some(link) = self.link.as_mut() else { return };
        shared.returns.take(&mut self.taken);
        if self.taken.is_empty() {
            return;
        }
        self.frames.clear();
        let envelope = Envelope {
            releases: Array::from(&self.taken.leases),
            ..Envelope::default()
        };
        let encoded = self
            .taken
            .encode_abandoned(&mut self.frames)
            .and_then(|()| Ok(Request::Release.encode(&envelope, &mut self.frames)?));
        if encoded.and_then(|()| link.send(&self.frames)).is_err() {
            self.disconnect(shared);
        }
    }

    /// Says goodbye without waiting for an answer.
    pub(super) fn part(&mut self, returns: &Returns) {
        let Some(mut link) = self.link.take() else { return };
        returns.begin_epoch();
        self.frames.clear();
        let envelope = Envelope {
            request: link.number(),
            ..Envelope::default()
        };
        if Request::Goodbye.encode(&envelope, &mut self.frames).is_ok() {
            // If it cannot be sent, the node sees the connection end instead.
            let _ = link.send(&self.frames);
        }
    }
}
