use super::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::memory::MemoryRegion;

fn pair() -> (UnixStream, UnixStream) {
    UnixStream::pair().expect("a pair of sockets")
}

fn a_pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe")
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("descriptors").count()
}

#[test]
fn descriptors_arrive_with_the_bytes_they_were_sent_with() {
    let (left, right) = pair();
    let (reader, writer) = a_pipe();
    assert_eq!(send_with_fds(&left, b"here", &[writer.as_fd()]).expect("sent"), 4);
    let (mut bytes, mut fds) = ([0; 16], Vec::new());
    assert_eq!(receive_with_fds(&right, &mut bytes, &mut fds).expect("received"), 4);
    assert_eq!(&bytes[..4], b"here");
    drop(writer);
    let arrived = fds.pop().expect("one descriptor");
    assert!(
        rustix::io::fcntl_getfd(&arrived)
            .expect("flags")
            .contains(rustix::io::FdFlags::CLOEXEC),
        "no child inherits it"
    );
    rustix::io::write(&arrived, b"through").expect("it is the pipe's");
    let mut through = [0; 7];
    rustix::io::read(&reader, &mut through).expect("read");
    assert_eq!(&through, b"through");
}

/// A client that read nothing once held its session in an endless poll, long past the socket's send timeout.
#[test]
fn a_peer_that_does_not_read_ends_a_send_at_its_timeout() {
    let (left, _right) = pair();
    left.set_write_timeout(Some(std::time::Duration::from_millis(20)))
        .expect("a timeout");
    let error = send_all_with_fds(&left, &vec![1; 8 << 20], &[]).expect_err("nobody reads");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

#[test]
fn messages_without_descriptors_and_the_end_of_the_stream_are_plain() {
    let (left, right) = pair();
    send_with_fds(&left, b"plain", &[]).expect("sent");
    let (mut bytes, mut fds) = ([0; 16], Vec::new());
    assert_eq!(receive_with_fds(&right, &mut bytes, &mut fds).expect("received"), 5);
    drop(left);
    assert_eq!(receive_with_fds(&right, &mut bytes, &mut fds).expect("the end"), 0);
    assert!(fds.is_empty());
    let gone = send_with_fds(&right, b"x", &[]).expect_err("nobody is there");
    assert_eq!(gone.kind(), io::ErrorKind::BrokenPipe, "an error, not a signal");
}

#[test]
fn as_many_descriptors_as_agreed_pass_and_one_more_is_refused() {
    let (left, right) = pair();
    let (reader, _writer) = a_pipe();
    send_with_fds(&left, b"x", &[reader.as_fd(); FDS_MAX]).expect("sent");
    let (mut bytes, mut fds) = ([0; 1], Vec::new());
    receive_with_fds(&right, &mut bytes, &mut fds).expect("received");
    assert_eq!(fds.len(), FDS_MAX);
    let refused = send_with_fds(&left, b"x", &[reader.as_fd(); FDS_MAX + 1]).expect_err("too many");
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    assert!(
        send_with_fds(&left, b"", &[reader.as_fd()]).is_err(),
        "descriptors need a byte to ride on"
    );
}

/// Alone in its process, for it counts descriptors.
#[test]
fn a_peer_that_sends_too_many_descriptors_is_an_error_and_none_stays_open() {
    const CHILD: &str = "KVTIER_SOCKET_TEST_ALONE";
    if std::env::var_os(CHILD).is_none() {
        let test = "socket::tests::a_peer_that_sends_too_many_descriptors_is_an_error_and_none_stays_open";
        let run = Command::new(std::env::current_exe().expect("this test"))
            .args([test, "--exact", "--test-threads=1"])
            .env(CHILD, "1")
            .stdout(Stdio::null())
            .status();
        assert!(run.expect("it runs").success());
        return;
    }
    let (left, right) = pair();
    let (reader, writer) = a_pipe();
    let before = open_descriptors();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(100))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let many = [reader.as_fd(); 100];
    assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
    sendmsg(&left, &[IoSlice::new(b"flood")], &mut control, SendFlags::NOSIGNAL).expect("sent");
    let (mut bytes, mut fds) = ([0; 16], Vec::new());
    let refused = receive_with_fds(&right, &mut bytes, &mut fds).expect_err("cut off");
    assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
    assert!(fds.is_empty());
    assert_eq!(open_descriptors(), before);
    drop(writer);
}

#[test]
fn large_messages_on_a_non_blocking_socket_are_sent_to_the_end() {
    let (left, right) = pair();
    left.set_nonblocking(true).expect("a flag");
    let message: Vec<u8> = (0..3_000_000u32).map(|at| (at % 253).to_le_bytes()[0]).collect();
    let (reader, _writer) = a_pipe();
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| send_all_with_fds(&left, &message, &[reader.as_fd()]));
        let mut received = vec![0; 1000];
        let mut fds = Vec::new();
        let first = receive_with_fds(&right, &mut received, &mut fds).expect("received");
        received.truncate(first);
        assert_eq!(fds.len(), 1, "with the first bytes");
        (&right)
            .take((message.len() - first) as u64)
            .read_to_end(&mut received)
            .expect("the rest");
        sending.join().expect("no panic").expect("sent");
        assert!(received == message);
    });
}

#[test]
fn a_full_non_blocking_socket_would_block_and_takes_no_descriptor() {
    let (left, _right) = pair();
    left.set_nonblocking(true).expect("a flag");
    let (reader, _writer) = a_pipe();
    let refused = loop {
        if let Err(error) = send_with_fds(&left, &[0; 65_536], &[]) {
            break error;
        }
    };
    assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
    let refused = send_with_fds(&left, &[0; 65_536], &[reader.as_fd()]).expect_err("still full");
    assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn packets_keep_their_boundaries() {
    let (left, right) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a pair");
    send_with_fds(&left, b"one", &[]).expect("sent");
    send_with_fds(&left, b"two", &[]).expect("sent");
    let mut bytes = [0; 16];
    assert_eq!(
        receive_with_fds(&right, &mut bytes, &mut Vec::new()).expect("received"),
        3
    );
    assert_eq!(&bytes[..3], b"one");
}

#[test]
fn the_peer_is_known() {
    let (left, _right) = pair();
    let peer = peer_credentials(&left).expect("credentials");
    assert_eq!(peer.pid, Some(std::process::id()));
    assert_eq!(
        (peer.uid, peer.gid),
        (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
    );
    for pidfd in [peer_pidfd(&left), peer_pidfd_by_pid(left.as_fd())] {
        match pidfd {
            Ok(pidfd) => assert!(!process_is_gone(&pidfd), "we are alive"),
            Err(error) => eprintln!("skipped: pidfd: {error}"),
        }
    }
}

#[test]
fn a_peer_by_pid_is_refused_once_it_hung_up() {
    let (left, right) = pair();
    drop(right);
    assert!(
        peer_pidfd_by_pid(left.as_fd()).is_err(),
        "the pid may belong to somebody else by now"
    );
}

#[test]
fn a_process_that_ended_is_gone() {
    let mut child = Command::new("cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("cat");
    let pid = rustix::process::Pid::from_child(&child);
    let pidfd =
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).expect("a kernel of 5.3 or later");
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all(b"x").expect("written");
    child
        .stdout
        .as_mut()
        .expect("a pipe")
        .read_exact(&mut [0])
        .expect("it lives");
    assert!(!process_is_gone(&pidfd));
    child.kill().expect("killed");
    // Not waited for yet: a zombie maps no memory any more.
    let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
    rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 30, tv_nsec: 0 })).expect("polled");
    assert!(process_is_gone(&pidfd));
    child.wait().expect("reaped");
    assert!(process_is_gone(&pidfd));
}

/// Both ends of a TCP connection within this node.
fn tcp_pair() -> (std::net::TcpStream, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let near = std::net::TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
    (near, listener.accept().expect("a caller").0)
}

#[test]
fn pages_that_were_sent_without_a_copy_are_told_to_be_free_once_they_are() {
    const BYTES: usize = 1 << 20;
    let (near, far) = tcp_pair();
    let mut zerocopy = match ZeroCopy::enable(&near) {
        Ok(zerocopy) => zerocopy,
        Err(error) => return println!("skipped: zero-copy sends: {error}"),
    };
    let region = MemoryRegion::anonymous(BYTES).expect("memory");
    let all = region.slice(0, BYTES).expect("all");
    all.copy_from_slice(&vec![0x5a; BYTES]).expect("equal");
    let reading = std::thread::spawn(move || {
        let target = MemoryRegion::anonymous(BYTES).expect("memory");
        let target = target.slice(0, BYTES).expect("all");
        receive_exactly(&far, &target).map(|()| target.to_vec())
    });
    zerocopy
        .send(&near, &[Part::Bytes(b""), Part::Memory(&all)])
        .expect("sent");
    zerocopy.settle(&near, Duration::from_secs(20)).expect("told");
    // Ours again: what is written now reaches nobody.
    all.zero();
    assert!(reading.join().expect("no panic").expect("received") == vec![0x5a; BYTES]);
    assert!(zerocopy.was_copied(), "within a node the kernel copies");
}

#[test]
fn pages_on_a_connection_that_nobody_reads_are_free_after_it_was_aborted() {
    const BYTES: usize = 1 << 20;
    let (near, far) = tcp_pair();
    let mut zerocopy = match ZeroCopy::enable(&near) {
        Ok(zerocopy) => zerocopy,
        Err(error) => return println!("skipped: zero-copy sends: {error}"),
    };
    let region = MemoryRegion::anonymous(BYTES).expect("memory");
    let all = region.slice(0, BYTES).expect("all");
    near.set_write_timeout(Some(Duration::from_millis(200))).expect("set");
    // As much as the socket takes: the peer never reads.
    while zerocopy.send(&near, &[Part::Memory(&all)]).is_ok() {}
    assert!(zerocopy.settle(&near, Duration::from_millis(50)).is_err() || zerocopy.was_copied());
    zerocopy.abort(&near, Duration::from_secs(20)).expect("given back");
    drop(far);
}
