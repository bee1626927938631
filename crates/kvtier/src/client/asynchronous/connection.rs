use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use kvtier_core::{Fetched, Reserved};
use kvtier_transfer::socket::{receive_with_fds, send_with_fds};
use parking_lot::Mutex;
use rustix::net::Shutdown;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

use super::super::link::{GRACE, HELLO_REQUEST, READ_BYTES, encode_hello, micros, refused, welcome_of};
use super::super::returns::{Returns, Taken};
use super::super::session::Session;
use super::super::{ClientError, ClientOptions};
use super::Patience;
use crate::wire::{Array, Envelope, Extensions, FrameStream, Header, Reply, Request, Welcome};

/// One connection and the two tasks that serve it: one reads and hands answers out, one writes what the socket did not
/// take at once. Both end when it is closed.
pub(super) struct Connection {
    socket: UnixStream,
    returns: Arc<Returns>,
    epoch: u64,
    state: Mutex<State>,
    /// There are bytes that the socket did not take.
    backlog: Notify,
}

struct State {
    session: Session,
    /// By request number.
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    next_request: u64,
    outgoing: Vec<u8>,
    taken: Taken,
    /// Why it was closed.
    closed: Option<ClientError>,
}

/// A request in flight.
pub(super) struct Pending {
    connection: Arc<Connection>,
    answer: oneshot::Receiver<Answer>,
    timeout: Duration,
}

/// A reply as it came. When nobody looks at it, what it leases is given back.
struct Answer {
    connection: Arc<Connection>,
    header: Header,
    body: Vec<u8>,
    looked_at: bool,
}

impl Connection {
    /// Connects and says hello.
    pub(super) async fn open(options: &ClientOptions, returns: &Arc<Returns>) -> Result<Arc<Connection>, ClientError> {
        let patience = options.timeout + GRACE;
        let opening = async {
            let socket = UnixStream::connect(&options.socket)
                .await
                .map_err(|error| refused(&options.socket, &error))?;
            let mut frames = Vec::new();
            encode_hello(options, &mut frames)?;
            // A fresh socket takes a hello whole.
            send_with_fds(&socket, &frames, &[]).map_err(|error| ClientError::lost(&error))?;
            let mut incoming = Incoming {
                stream: FrameStream::new(READ_BYTES),
                fds: VecDeque::new(),
            };
            let welcome = incoming.welcome(&socket).await?;
            Ok::<_, ClientError>((socket, incoming, welcome))
        };
        let (socket, incoming, welcome) = timeout(patience, opening).await.map_err(|_| ClientError::late())??;
        let epoch = returns.epoch();
        let connection = Arc::new(Connection {
            socket,
            returns: Arc::clone(returns),
            epoch,
            state: Mutex::new(State {
                session: Session::begin(welcome, epoch, options)?,
                waiting: HashMap::new(),
                next_request: HELLO_REQUEST + 1,
                outgoing: Vec::new(),
                taken: Taken::default(),
                closed: None,
            }),
            backlog: Notify::new(),
        });
        tokio::spawn(read(Arc::clone(&connection), incoming));
        tokio::spawn(write(Arc::clone(&connection)));
        Ok(connection)
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state.lock().closed.is_some()
    }

    pub(super) fn with_session<T>(&self, look: impl FnOnce(&mut Session) -> T) -> T {
        look(&mut self.state.lock().session)
    }

    /// Sends a request with what is to be given back. Never waits: what the socket does not take goes later.
    pub(super) fn send(
        self: &Arc<Self>,
        request: &Request<'_>,
        extensions: impl Into<Extensions<'static>>,
        patience: Patience,
        clock_ns: u64,
    ) -> Result<Pending, ClientError> {
        let (sender, answer) = oneshot::channel();
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if let Some(error) = &state.closed {
            return Err(error.clone());
        }
        let number = state.next_request;
        state.next_request += 1;
        self.returns.take(&mut state.taken);
        let start = state.outgoing.len();
        let envelope = Envelope {
            request: number,
            deadline_us: micros(patience.node),
            clock_ns: if state.session.welcome.client_clock {
                clock_ns
            } else {
                0
            },
            releases: Array::from(&state.taken.leases),
            extensions: extensions.into(),
        };
        let encoded = state
            .taken
            .encode_abandoned(&mut state.outgoing)
            .and_then(|()| Ok(request.encode(&envelope, &mut state.outgoing)?));
        if let Err(error) = encoded {
            state.outgoing.truncate(start);
            // The request was refused here; what it would have taken along goes with the next one.
            self.returns.release(self.epoch, state.taken.leases.drain(..));
            self.returns.abandon(self.epoch, state.taken.reservations.drain(..));
            return Err(error);
        }
        state.waiting.insert(number, sender);
        let sent = self.push(state, start);
        drop(guard);
        sent.inspect_err(|error| self.fail(error.clone()))?;
        Ok(Pending {
            connection: Arc::clone(self),
            answer,
            timeout: patience.answer,
        })
    }

    /// Sends what is to be given back, in frames of its own.
    pub(super) fn send_returns(self: &Arc<Self>) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if state.closed.is_some() {
            return;
        }
        self.returns.take(&mut state.taken);
        if state.taken.is_empty() {
            return;
        }
        let start = state.outgoing.len();
        let envelope = Envelope {
            releases: Array::from(&state.taken.leases),
            ..Envelope::default()
        };
        let encoded = state
            .taken
            .encode_abandoned(&mut state.outgoing)
            .and_then(|()| Ok(Request::Release.encode(&envelope, &mut state.outgoing)?));
        let sent = encoded.and_then(|()| self.push(state, start));
        drop(guard);
        if let Err(error) = sent {
            self.fail(error);
        }
    }

    /// Offers the socket what was appended from `start` on, unless something before it still waits.
    fn push(&self, state: &mut State, start: usize) -> Result<(), ClientError> {
        if start == 0 {
            self.drain(state)?;
        }
        if !state.outgoing.is_empty() {
            self.backlog.notify_one();
        }
        Ok(())
    }

    /// Sends until nothing is left or the socket is full.
    fn drain(&self, state: &mut State) -> Result<(), ClientError> {
        let mut sent = 0;
        let result = loop {
            if sent == state.outgoing.len() {
                break Ok(());
            }
            match send_with_fds(&self.socket, &state.outgoing[sent..], &[]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(()),
                Err(error) => break Err(ClientError::lost(&error)),
            }
        };
        state.outgoing.drain(..sent);
        result
    }

    /// Waits until the socket takes bytes again, and sends some.
    async fn send_backlog(&self) -> Result<(), ClientError> {
        self.socket
            .writable()
            .await
            .map_err(|error| ClientError::lost(&error))?;
        let mut state = self.state.lock();
        match self
            .socket
            .try_io(Interest::WRITABLE, || send_with_fds(&self.socket, &state.outgoing, &[]))
        {
            Ok(sent) => {
                state.outgoing.drain(..sent);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(ClientError::lost(&error)),
        }
    }

    /// Closes it: every request in flight gets `error`, and what was leased over it is refused from here on.
    pub(super) fn fail(&self, error: ClientError) {
        let waiting = {
            let mut state = self.state.lock();
            if state.closed.is_some() {
                return;
            }
            state.closed = Some(error);
            std::mem::take(&mut state.waiting)
        };
        self.returns.begin_epoch();
        // Both tasks see the end: the reader of the stream, the writer the alarm.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
        self.backlog.notify_one();
        drop(waiting);
    }

    pub(super) fn close(&self) {
        self.fail(ClientError::closed("this client has said goodbye: connect anew"));
    }

    /// Says goodbye without waiting for an answer, and closes.
    pub(super) fn part(&self) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let number = state.next_request;
        if state.closed.is_none()
            && Request::Goodbye
                .encode(
                    &Envelope {
                        request: number,
                        ..Envelope::default()
                    },
                    &mut state.outgoing,
                )
                .is_ok()
        {
            // If it cannot be sent, the node sees the connection end instead.
            let _ = self.drain(state);
        }
        drop(guard);
        self.close();
    }

    fn why_closed(&self) -> ClientError {
        self.state.lock().closed.clone().unwrap_or_else(ClientError::unanswered)
    }

    /// Hands one frame to whoever waits for it.
    fn absorb(self: &Arc<Self>, incoming: &mut Incoming) -> Result<bool, ClientError> {
        let Some(frame) = incoming.stream.next()? else {
            return Ok(false);
        };
        let number = frame.header.request;
        if number == 0 {
            let (reply, _) = Reply::decode(&frame.header, frame.body)?;
            self.with_session(|session| session.absorb_notice(&reply, &mut incoming.fds))?;
            return Ok(true);
        }
        let waiting = self.state.lock().waiting.remove(&number);
        let connection = Arc::clone(self);
        let answer = Answer {
            connection,
            header: frame.header,
            body: frame.body.to_vec(),
            looked_at: false,
        };
        if let Some(waiting) = waiting {
            // When its future was dropped the answer comes back, and gives back what it leases.
            drop(waiting.send(answer));
        }
        Ok(true)
    }
}

impl Pending {
    /// Waits for the answer. When none comes in time, or one that breaks the protocol, the connection is closed.
    pub(super) async fn wait<T>(
        self,
        absorb: impl FnOnce(&mut Session, Reply<'_>) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        let connection = self.connection;
        let mut answer = match timeout(self.timeout + GRACE, self.answer).await {
            Err(_) => {
                connection.fail(ClientError::late());
                return Err(ClientError::late());
            }
            Ok(Err(_)) => return Err(connection.why_closed()),
            Ok(Ok(answer)) => answer,
        };
        answer.looked_at = true;
        let absorbed = match Reply::decode(&answer.header, &answer.body) {
            Ok((Reply::Error { kind, message }, _)) => return Err(ClientError::new(kind, message)),
            Ok((reply, _)) => connection.with_session(|session| absorb(session, reply)),
            Err(error) => Err(error.into()),
        };
        absorbed.inspect_err(|error| connection.fail(error.clone()))
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.looked_at {
            return;
        }
        let (returns, epoch) = (&self.connection.returns, self.connection.epoch);
        match Reply::decode(&self.header, &self.body) {
            Ok((Reply::Fetched { outcomes, .. }, _)) => returns.release(
                epoch,
                outcomes.iter().filter_map(|outcome| match outcome {
                    Fetched::Leased { lease, .. } => Some(lease),
                    Fetched::Miss | Fetched::Busy => None,
                }),
            ),
            Ok((Reply::Reserved { outcomes, .. }, _)) => returns.abandon(
                epoch,
                outcomes.iter().filter_map(|outcome| match outcome {
                    Reserved::Granted { reservation, .. } => Some(reservation),
                    Reserved::Present | Reserved::Busy => None,
                }),
            ),
            Ok((Reply::Sealed { granted: slots, .. } | Reply::Granted { slots }, _)) => {
                returns.abandon(epoch, slots.iter().map(|slot| slot.reservation));
            }
            _ => {}
        }
    }
}

/// What was received and not yet looked at.
struct Incoming {
    stream: FrameStream,
    fds: VecDeque<OwnedFd>,
}

impl Incoming {
    async fn welcome(&mut self, socket: &UnixStream) -> Result<Welcome, ClientError> {
        loop {
            if let Some(frame) = self.stream.next()? {
                return welcome_of(&frame);
            }
            self.read(socket).await?;
        }
    }

    async fn read(&mut self, socket: &UnixStream) -> Result<(), ClientError> {
        let mut received = Vec::new();
        let count = loop {
            socket.readable().await.map_err(|error| ClientError::lost(&error))?;
            let space = self.stream.space();
            match socket.try_io(Interest::READABLE, || receive_with_fds(socket, space, &mut received)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => break result.map_err(|error| ClientError::lost(&error))?,
            }
        };
        if count == 0 {
            return Err(ClientError::unanswered());
        }
        self.stream.advance(count);
        self.fds.extend(received);
        Ok(())
    }
}

/// The task that reads.
async fn read(connection: Arc<Connection>, mut incoming: Incoming) {
    loop {
        let absorbed = loop {
            match connection.absorb(&mut incoming) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        let result = match absorbed {
            Ok(()) => incoming.read(&connection.socket).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            connection.fail(error);
            return;
        }
    }
}

/// The task that writes what the socket did not take at once.
async fn write(connection: Arc<Connection>) {
    loop {
        connection.backlog.notified().await;
        loop {
            {
                let state = connection.state.lock();
                if state.closed.is_some() {
                    return;
                }
                // Nothing is left, or somebody else sent it.
                if state.outgoing.is_empty() {
                    break;
                }
            }
            if let Err(error) = connection.send_backlog().await {
                connection.fail(error);
                return;
            }
        }
    }
}
