//! What is asked of the server, request by request, and what its answers mean. The SDK signs, and tries again what failed in passing; each
//! call here ends when its caller's time does.

use std::ops::Range;
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Config, Region, RequestChecksumCalculation, ResponseChecksumValidation, SharedCredentialsProvider,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::list_object_versions::ListObjectVersionsOutput;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart, Delete, ObjectIdentifier};
use aws_smithy_http_client::tls;
use base64::prelude::{BASE64_STANDARD, Engine};
use kvtier_transfer::crc32c;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::S3Settings;
use super::credentials::FromFile;
use crate::remote::StoreError;
use crate::remote::store::readable;

/// What is put in parts is longer than this.
const PARTS_FROM: usize = 16 << 20;
/// Of one part; the last one may be shorter. Servers want at least 5 MiB.
const PART_BYTES: usize = 8 << 20;
/// Parts that are sent at once.
const PARTS_AT_ONCE: usize = 4;
/// Tries of one request, the first among them.
const TRIES: u32 = 3;
/// What one deletion may name.
const DELETED_AT_ONCE: usize = 1000;

/// A bucket of a server, and the part of it that is ours.
#[derive(Clone)]
pub(super) struct Bucket {
    client: Client,
    /// For messages.
    pub(super) name: String,
    bucket: String,
}

/// An object that a listing found.
pub(super) struct Listed {
    pub(super) key: String,
    pub(super) bytes: u64,
}

/// Where a listing goes on.
pub(super) enum After {
    /// Behind this key.
    Key(String),
    /// Where the server said.
    Page(String),
}

/// Where a listing of versions, or of uploads, goes on: behind this key, and this version or upload of it.
type Marker = (String, Option<String>);

/// Of an object, every version that a server keeps.
struct Version {
    key: String,
    version: Option<String>,
}

impl Bucket {
    pub(super) fn new(settings: &S3Settings) -> Bucket {
        let tls = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::AwsLc);
        let http = aws_smithy_http_client::Builder::new().tls_provider(tls).build_https();
        let config = Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(settings.region.clone()))
            .credentials_provider(SharedCredentialsProvider::new(FromFile(settings.credentials.clone())))
            .force_path_style(settings.path_style)
            // What is not asked for by the protocol, servers of other makers do not know. Contents are sealed, and have sums of their own.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .retry_config(
                RetryConfig::standard()
                    .with_max_attempts(TRIES)
                    .with_initial_backoff(Duration::from_millis(50)),
            )
            .timeout_config(TimeoutConfig::builder().connect_timeout(settings.timeout).build())
            .http_client(http);
        let config = match &settings.endpoint {
            Some(endpoint) => config.endpoint_url(endpoint),
            None => config,
        };
        let server = settings.endpoint.as_deref().unwrap_or("https://s3.amazonaws.com");
        Bucket {
            client: Client::from_conf(config.build()),
            name: format!("{}/{}", server.trim_end_matches('/'), settings.bucket),
            bucket: settings.bucket.clone(),
        }
    }

    /// The smallest trip that shows whether this node is let in.
    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        let asked = self.client.head_bucket().bucket(&self.bucket).send().await;
        // An answer without a body: no words.
        match asked {
            Ok(_) => Ok(()),
            Err(error) => Err(self.trouble("HeadBucket", &error)),
        }
    }

    /// A page of what begins so, from behind `after` on, and where the next begins.
    pub(super) async fn list(
        &self,
        prefix: &str,
        after: Option<After>,
    ) -> Result<(Vec<Listed>, Option<After>), StoreError> {
        let asked = self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix);
        let asked = match after {
            None => asked,
            Some(After::Key(key)) => asked.start_after(key),
            Some(After::Page(token)) => asked.continuation_token(token),
        };
        let page = asked.send().await;
        let page = page.map_err(|error| self.trouble("ListObjectsV2", &error))?;
        let found = page.contents().iter().filter_map(|object| {
            Some(Listed {
                key: object.key()?.to_owned(),
                bytes: u64::try_from(object.size()?).ok()?,
            })
        });
        let found: Vec<Listed> = found.collect();
        if found.iter().any(|object| !object.key.starts_with(prefix)) {
            return Err(self.garbled("ListObjectsV2", "keys that were not asked for"));
        }
        // A page may be empty and not the last one.
        let next = match (page.is_truncated().unwrap_or(false), page.next_continuation_token()) {
            (false, _) => None,
            (true, Some(token)) => Some(After::Page(token.to_owned())),
            (true, None) => return Err(self.garbled("ListObjectsV2", "a part without a word of where it goes on")),
        };
        Ok((found, next))
    }

    /// Bytes of an object, in the pieces in which they came; `None` where there is no such object. The SDK does not ask again where an
    /// answer broke off: that is done once here.
    pub(super) async fn get(&self, key: &str, range: Range<u64>) -> Result<Option<Vec<bytes::Bytes>>, StoreError> {
        match self.get_once(key, range.clone()).await {
            Err(StoreError::Unavailable { .. }) => self.get_once(key, range).await,
            other => other,
        }
    }

    async fn get_once(&self, key: &str, range: Range<u64>) -> Result<Option<Vec<bytes::Bytes>>, StoreError> {
        let asked = self.client.get_object().bucket(&self.bucket).key(key);
        let asked = asked.range(format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
        let mut got = match asked.send().await {
            Ok(got) => got,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(self.trouble("GetObject", &error)),
        };
        let (mut pieces, mut bytes) = (Vec::new(), 0);
        while let Some(piece) = got.body.next().await {
            let piece = piece.map_err(|error| self.unavailable(&error.to_string()))?;
            bytes += piece.len() as u64;
            if bytes > range.end - range.start {
                return Err(self.garbled("GetObject", "more than was asked for"));
            }
            pieces.push(piece);
        }
        Ok(Some(pieces))
    }

    /// Puts an object that is not there yet. One that is there under this key was put by an earlier try.
    pub(super) async fn put(&self, key: &str, object: bytes::Bytes) -> Result<(), StoreError> {
        if object.len() > PARTS_FROM {
            return self.put_in_parts(key, object).await;
        }
        let checksum = crc32c(&object).to_be_bytes();
        let put = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(key)
            .if_none_match("*")
            .checksum_crc32_c(BASE64_STANDARD.encode(checksum))
            .body(ByteStream::from(object))
            .send()
            .await;
        match put {
            Ok(_) => Ok(()),
            Err(error) if is_there(&error) => Ok(()),
            Err(error) => Err(self.trouble("PutObject", &error)),
        }
    }

    async fn put_in_parts(&self, key: &str, object: bytes::Bytes) -> Result<(), StoreError> {
        // A task of its own: where its caller's time is over it still takes back what it began.
        let (here, gone) = oneshot::channel::<()>();
        let (this, key) = (self.clone(), key.to_owned());
        let putting = tokio::spawn(async move {
            let begun = this.client.create_multipart_upload().bucket(&this.bucket).key(&key);
            let begun = begun.send().await;
            let begun = begun.map_err(|error| this.trouble("CreateMultipartUpload", &error))?;
            let Some(upload) = begun.upload_id().map(str::to_owned) else {
                return Err(this.garbled("CreateMultipartUpload", "no upload"));
            };
            let done = tokio::select! {
                done = this.put_parts(&key, &upload, object) => done,
                _ = gone => Err(this.unavailable("the time for it was over")),
            };
            if done.is_err() {
                this.abort(&key, &upload).await?;
            }
            done
        });
        let done = putting.await;
        drop(here);
        done.unwrap_or_else(|_| Err(self.unavailable("the task that puts broke off")))
    }

    async fn put_parts(&self, key: &str, upload: &str, object: bytes::Bytes) -> Result<(), StoreError> {
        let (mut sending, mut parts) = (JoinSet::new(), Vec::new());
        for (number, from) in (1..).zip((0..object.len()).step_by(PART_BYTES)) {
            if sending.len() >= PARTS_AT_ONCE {
                parts.push(self.joined(&mut sending).await?);
            }
            let piece = object.slice(from..object.len().min(from + PART_BYTES));
            let (this, key, upload) = (self.clone(), key.to_owned(), upload.to_owned());
            sending.spawn(async move {
                let asked = this
                    .client
                    .upload_part()
                    .bucket(&this.bucket)
                    .key(key)
                    .upload_id(upload);
                let sent = asked.part_number(number).body(ByteStream::from(piece)).send().await;
                let sent = sent.map_err(|error| this.trouble("UploadPart", &error))?;
                Ok(CompletedPart::builder()
                    .part_number(number)
                    .set_e_tag(sent.e_tag().map(str::to_owned))
                    .build())
            });
        }
        while !sending.is_empty() {
            parts.push(self.joined(&mut sending).await?);
        }
        parts.sort_unstable_by_key(CompletedPart::part_number);
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let asked = self.client.complete_multipart_upload().bucket(&self.bucket).key(key);
        let asked = asked.upload_id(upload).multipart_upload(parts).if_none_match("*");
        match asked.send().await {
            Ok(_) => Ok(()),
            Err(error) if is_there(&error) => Ok(()),
            Err(error) => Err(self.trouble("CompleteMultipartUpload", &error)),
        }
    }

    async fn joined(
        &self,
        sending: &mut JoinSet<Result<CompletedPart, StoreError>>,
    ) -> Result<CompletedPart, StoreError> {
        let broke_off = || Err(self.unavailable("a task that puts a part broke off"));
        sending.join_next().await.and_then(Result::ok).unwrap_or_else(broke_off)
    }

    async fn abort(&self, key: &str, upload: &str) -> Result<(), StoreError> {
        let asked = self.client.abort_multipart_upload().bucket(&self.bucket).key(key);
        match asked.upload_id(upload).send().await {
            Ok(_) => Ok(()),
            Err(error) if code_of(&error) == Some("NoSuchUpload") => Ok(()),
            Err(error) => Err(self.trouble("AbortMultipartUpload", &error)),
        }
    }

    /// Deletes objects; those that are not there are no error.
    pub(super) async fn delete(&self, keys: &[String]) -> Result<(), StoreError> {
        let version = |key: &String| Version {
            key: key.clone(),
            version: None,
        };
        self.delete_versions(keys.iter().map(version).collect()).await
    }

    async fn delete_versions(&self, versions: Vec<Version>) -> Result<(), StoreError> {
        for versions in versions.chunks(DELETED_AT_ONCE) {
            let object = |version: &Version| {
                ObjectIdentifier::builder()
                    .key(&version.key)
                    .set_version_id(version.version.clone())
                    .build()
                    .expect("it has a key")
            };
            let objects = versions.iter().map(object).collect();
            let delete = Delete::builder().set_objects(Some(objects)).quiet(true).build();
            let asked = self.client.delete_objects().bucket(&self.bucket);
            let deleted = asked.delete(delete.expect("it has objects")).send().await;
            let deleted = deleted.map_err(|error| self.trouble("DeleteObjects", &error))?;
            let kept = deleted.errors().iter().find(|error| error.code() != Some("NoSuchKey"));
            if let Some(kept) = kept {
                let (code, words) = (kept.code().unwrap_or("an error"), kept.message().unwrap_or_default());
                return Err(self.refused("DeleteObjects", &format!("{code} {words}")));
            }
        }
        Ok(())
    }

    /// Deletes all that begins so, in all its versions, and what was never completed, and looks again: how much a second look found.
    pub(super) async fn erase(&self, prefix: &str, deleted: &mut u64) -> Result<u64, StoreError> {
        self.abort_uploads(prefix, &|_| true, deleted).await?;
        let mut after = None;
        loop {
            let (versions, next) = self.versions(prefix, after).await?;
            let count = versions.len() as u64;
            self.delete_versions(versions).await?;
            *deleted += count;
            match next {
                None => break,
                next => after = next,
            }
        }
        let (mut left, mut after) = (self.uploads(prefix).await?.len() as u64, None);
        loop {
            let (versions, next) = self.versions(prefix, after).await?;
            left += versions.len() as u64;
            match next {
                None => return Ok(left),
                next => after = next,
            }
        }
    }

    /// Takes back uploads in parts that were begun and not completed, of these keys.
    pub(super) async fn abort_uploads(
        &self,
        prefix: &str,
        is_meant: &(dyn Fn(&str) -> bool + Sync),
        count: &mut u64,
    ) -> Result<(), StoreError> {
        for (key, upload) in self.uploads(prefix).await? {
            if is_meant(&key) {
                self.abort(&key, &upload).await?;
                *count += 1;
            }
        }
        Ok(())
    }

    /// A page of what begins so: objects, versions of them, and marks of deletion, which say that something was there; and where the next
    /// begins.
    async fn versions(
        &self,
        prefix: &str,
        after: Option<Marker>,
    ) -> Result<(Vec<Version>, Option<Marker>), StoreError> {
        const COMMAND: &str = "ListObjectVersions";
        let asked = self.client.list_object_versions().bucket(&self.bucket).prefix(prefix);
        let (key, version) = after.unzip();
        let asked = asked.set_key_marker(key).set_version_id_marker(version.flatten());
        let page: ListObjectVersionsOutput = match asked.send().await {
            Ok(page) => page,
            // Whoever knows no versions has none.
            Err(error) if matches!(code_of(&error), Some("NotImplemented")) => return self.unversioned(prefix).await,
            Err(error) => return Err(self.trouble(COMMAND, &error)),
        };
        let objects = page.versions().iter().map(|object| (object.key(), object.version_id()));
        let marks = page.delete_markers().iter().map(|mark| (mark.key(), mark.version_id()));
        let found = objects.chain(marks).filter_map(|(key, version)| {
            Some(Version {
                key: key?.to_owned(),
                version: version.map(str::to_owned),
            })
        });
        let found: Vec<Version> = found.collect();
        if found.iter().any(|version| !version.key.starts_with(prefix)) {
            return Err(self.garbled(COMMAND, "keys that were not asked for"));
        }
        let next = match (page.is_truncated().unwrap_or(false), page.next_key_marker()) {
            (false, _) => None,
            (true, Some(key)) => Some((key.to_owned(), page.next_version_id_marker().map(str::to_owned))),
            (true, None) => return Err(self.garbled(COMMAND, "a part without a word of where it goes on")),
        };
        Ok((found, next))
    }

    /// All objects, as versions without a name.
    async fn unversioned(&self, prefix: &str) -> Result<(Vec<Version>, Option<Marker>), StoreError> {
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let (page, next) = self.list(prefix, after).await?;
            all.extend(page.into_iter().map(|listed| Version {
                key: listed.key,
                version: None,
            }));
            match next {
                None => return Ok((all, None)),
                next => after = next,
            }
        }
    }

    /// Uploads in parts that were begun and not completed: their bytes lie there, and no listing of objects has them.
    async fn uploads(&self, prefix: &str) -> Result<Vec<(String, String)>, StoreError> {
        let found = self.uploads_of(Some(prefix), prefix).await?;
        if found.is_empty() {
            // Some servers take the prefix for a whole key.
            return self.uploads_of(None, prefix).await;
        }
        Ok(found)
    }

    async fn uploads_of(&self, asked_for: Option<&str>, prefix: &str) -> Result<Vec<(String, String)>, StoreError> {
        const COMMAND: &str = "ListMultipartUploads";
        let (mut all, mut after): (Vec<(String, String)>, Option<Marker>) = (Vec::new(), None);
        loop {
            let asked = self.client.list_multipart_uploads().bucket(&self.bucket);
            let (key, upload) = after.unzip();
            let asked = asked.set_prefix(asked_for.map(str::to_owned)).set_key_marker(key);
            let page = match asked.set_upload_id_marker(upload.flatten()).send().await {
                Ok(page) => page,
                Err(error) if matches!(code_of(&error), Some("NotImplemented")) => return Ok(Vec::new()),
                Err(error) => return Err(self.trouble(COMMAND, &error)),
            };
            let uploads = page.uploads().iter();
            let uploads = uploads.filter_map(|upload| Some((upload.key()?.to_owned(), upload.upload_id()?.to_owned())));
            all.extend(uploads.filter(|(key, _)| key.starts_with(prefix)));
            after = match (page.is_truncated().unwrap_or(false), page.next_key_marker()) {
                (false, _) => return Ok(all),
                (true, Some(key)) => Some((key.to_owned(), page.next_upload_id_marker().map(str::to_owned))),
                (true, None) => return Err(self.garbled(COMMAND, "a part without a word of where it goes on")),
            };
        }
    }

    fn unavailable(&self, reason: &str) -> StoreError {
        StoreError::Unavailable {
            server: self.name.clone(),
            reason: readable(reason),
        }
    }

    fn refused(&self, command: &'static str, reason: &str) -> StoreError {
        StoreError::Refused {
            server: self.name.clone(),
            command,
            reason: readable(reason),
        }
    }

    fn garbled(&self, command: &'static str, reason: &'static str) -> StoreError {
        StoreError::Garbled {
            server: self.name.clone(),
            command,
            reason,
        }
    }

    fn trouble<E>(&self, command: &'static str, error: &SdkError<E>) -> StoreError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let unavailable = |reason: &str| self.unavailable(reason);
        match error {
            SdkError::ServiceError(answer) => {
                let status = answer.raw().status().as_u16();
                // An answer to HEAD has no body, and the SDK gives it a name of its own.
                let code = answer.err().code().filter(|code| *code != "NotFound");
                let code = code.map_or_else(|| word_of(status), str::to_owned);
                let words = answer.err().message().unwrap_or_default();
                // Of a put on a condition it says that another is under way: an earlier try's.
                let is_underway = status == 409 && matches!(command, "PutObject" | "CompleteMultipartUpload");
                if (status >= 500 && status != 501) || status == 429 || is_underway {
                    unavailable(&format!("it answers {code} {words}"))
                } else {
                    self.refused(command, format!("{code} {words}").trim())
                }
            }
            SdkError::ConstructionFailure(_) => unavailable(&innermost(error)),
            SdkError::ResponseError(_) => self.garbled(command, "no answer of S3"),
            _ => unavailable(&innermost(error)),
        }
    }
}

fn code_of<E: ProvideErrorMetadata>(error: &SdkError<E>) -> Option<&str> {
    match error {
        SdkError::ServiceError(answer) => answer.err().code(),
        _ => None,
    }
}

fn is_absent<E: ProvideErrorMetadata>(error: &SdkError<E>) -> bool {
    // Of an object that is shorter than it was: another, which is none of ours.
    matches!(code_of(error), Some("NoSuchKey" | "InvalidRange"))
}

fn is_there<E: ProvideErrorMetadata>(error: &SdkError<E>) -> bool {
    matches!(code_of(error), Some("PreconditionFailed"))
}

/// For answers without a body.
fn word_of(status: u16) -> String {
    match status {
        401 | 403 => "access denied".to_owned(),
        404 => "no such bucket".to_owned(),
        301 | 307 => "the bucket is in another region".to_owned(),
        other => format!("status {other}"),
    }
}

/// What lies at the bottom of an error: the words that say something.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
